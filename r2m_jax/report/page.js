"use strict";
// The page is whole without this script: every tab, prompt and last response is shown.
const all = (root, query) => [...root.querySelectorAll(query)];

// ---- light and dark: as the system has it until the button is pressed ----

const page = document.documentElement;
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (page.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const showTheme = () => theme.setAttribute("aria-pressed", isDark());
theme.hidden = false;
theme.onclick = () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
};
system.onchange = showTheme;
showTheme();

// ---- tabs: click, arrow keys, Home and End; the address keeps which one is open ----

const tabs = all(document, "[role=tab]");
function open(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  reachable();
}
tabs.forEach((tab, at) => {
  tab.onclick = () => {
    open(tab);
    history.replaceState(null, "", "#" + tab.dataset.name);
  };
  tab.onkeydown = (event) => {
    const last = tabs.length - 1;
    const to = {
      ArrowRight: at === last ? 0 : at + 1,
      ArrowLeft: at === 0 ? last : at - 1,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    tabs[to].focus();
    tabs[to].click();
  };
});

// ---- sliders over the steps ----

for (const section of all(document, "[data-slider]")) {
  const slider = section.querySelector("input[type=range]");
  const steps = JSON.parse(slider.dataset.names);
  slider.oninput = () => {
    const name = steps[slider.value];
    slider.setAttribute("aria-valuetext", name);
    section.querySelector("output[for]").value = name;
    for (const text of all(section, ".now")) text.textContent = name;
    for (const cell of all(section, "[data-at]")) cell.hidden = cell.dataset.at !== slider.value;
    reachable();
  };
}

// ---- prompts: one at a time, those with some text, or all ----

for (const section of all(document, "[data-browser]")) {
  const blocks = all(section, "[data-prompt]");
  const control = (name) => section.querySelector(`[data-control=${name}]`);
  let at = 0;
  let found = blocks;
  const show = () => {
    const whole = control("all").getAttribute("aria-pressed") === "true";
    at = Math.max(0, Math.min(at, found.length - 1));
    for (const block of blocks)
      block.hidden = !(whole ? found.includes(block) : block === found[at]);
    control("previous").disabled = whole || at === 0;
    control("next").disabled = whole || at >= found.length - 1;
    const which = whole ? "all" : Math.min(at + 1, found.length);
    control("place").value = found.length ? `${which} of ${found.length}` : "none has this text";
    reachable();
  };
  control("previous").onclick = () => { at -= 1; show(); };
  control("next").onclick = () => { at += 1; show(); };
  control("all").onclick = () => {
    const pressed = control("all").getAttribute("aria-pressed") === "true";
    control("all").setAttribute("aria-pressed", !pressed);
    show();
  };
  control("search").oninput = () => {
    const text = control("search").value.toLowerCase();
    found = blocks.filter((block) => block.textContent.toLowerCase().includes(text));
    at = 0;
    show();
  };
  if (control("arm"))
    control("arm").onchange = () => {
      const arm = control("arm").value;
      for (const row of all(section, "[data-arm]"))
        row.hidden = arm !== "" && row.dataset.arm !== "" && row.dataset.arm !== arm;
      reachable();
    };
  show();
}

// ---- what scrolls can be reached by the keyboard ----

function reachable() {
  for (const box of all(document, ".tall, .wide")) {
    const scrolls = box.scrollHeight > box.clientHeight || box.scrollWidth > box.clientWidth;
    if (scrolls) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

for (const controls of all(document, ".scripted")) controls.hidden = false;
const named = () => tabs.find((tab) => "#" + tab.dataset.name === location.hash);
if (tabs.length) open(named() || tabs[0]);
addEventListener("hashchange", () => named() && open(named()));
reachable();
addEventListener("resize", reachable);
