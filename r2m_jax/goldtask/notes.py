"""The notes task: real English with a gold reward that is a formula on text.

A prompt shows a short note of named values and asks for one or two sentences that use only some of
them, the facts. The other values are distractors. Gold counts what such a reply contains and lacks;
see `gold`. docs/lab.md, "The third task", has worked examples.

Host only (NumPy): gold never enters a training program.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from r2m_jax.goldtask import formula as own

# A value of a note is one word, a time or a number. No two lexicons share a word.
LEXICONS = {
  "guest": (
    "Marta Jonas Priya Kenji Amara Lucia Oskar Farah Diego Ingrid Tomas Leila Boris Naomi Pavel Zara "
    "Hugo Mei Stefan Aisha Ruben Greta Omar Elena Viktor Nadia Felix Yuki Samir Clara Ivan Rosa "
    "Anders Fatima Bruno Helga Mateo Sofia Emil Kavya Lars Noor Dmitri Paula Akira Wendy Theo Ximena "
    "Casper Laila Mirko Tessa Rafael Olga Gunnar Hana Silas Petra Enzo Dalia Jasper Ines Kofi"
  ),
  "town": (
    "Oslo Lisbon Nairobi Kyoto Quito Dublin Prague Havana Lima Tunis Geneva Boston Cairo Delhi Hanoi "
    "Seville Zagreb Austin Bergen Malmo Porto Turin Leeds Accra Dakar Riga Vilnius Tampere Krakow "
    "Ghent Utrecht Basel Nantes Toulouse Bilbao Naples Athens Ankara Izmir Doha Muscat Mumbai Colombo "
    "Jakarta Manila Osaka Sapporo Busan Perth Hobart Auckland Santiago Bogota Medellin Toronto Denver "
    "Seattle Phoenix Omaha Tulsa Memphis Dallas Chicago"
  ),
  "food": (
    "plum noodle dumpling mango pancake carrot waffle pretzel olive salmon lentil muffin walnut "
    "apricot pumpkin cookie burrito tomato onion mushroom lemon melon raisin almond cashew papaya "
    "sardine meatball tofu yogurt cheddar biscuit omelette risotto spinach broccoli lobster shrimp "
    "kebab falafel hummus gazpacho lasagna ravioli donut brownie croissant bagel cabbage turnip "
    "radish peanut hazelnut cinnamon ginger garlic avocado coconut banana pineapple grapefruit "
    "raspberry marmalade"
  ),
  "pet": (
    "otter parrot rabbit hamster ferret turtle lizard goldfish kitten poodle beagle canary pigeon "
    "donkey hedgehog gecko iguana tortoise llama alpaca goat pony peacock python tarantula "
    "chinchilla terrier spaniel dachshund greyhound collie husky mastiff pelican penguin raccoon "
    "squirrel badger beaver weasel lemur gibbon koala wombat panda walrus dolphin octopus lobworm "
    "crab newt salamander toad falcon raven magpie robin sparrow finch cockatoo budgie hen rooster"
  ),
  "gift": (
    "lantern kite teapot umbrella violin telescope blanket candle compass basket guitar puzzle "
    "backpack camera notebook scarf mirror pillow kettle helmet hammock drum flute trumpet ukulele "
    "vase wallet bracelet necklace sweater jacket mitten sandal slipper apron spatula skillet toaster "
    "radio keyboard suitcase bicycle skateboard tent canoe anchor globe hourglass thermos jigsaw "
    "marble balloon ribbon postcard diary calendar bookmark magnet doll teddy rug curtain armchair"
  ),
  "job": (
    "baker pilot plumber dentist florist carpenter librarian surgeon tailor jeweler electrician nurse "
    "chemist lawyer sculptor gardener mechanic architect pharmacist painter composer novelist "
    "accountant astronomer barber beekeeper blacksmith bookseller butcher cashier chauffeur chef "
    "dancer detective diver economist editor engineer farmer fisherman geologist goldsmith historian "
    "journalist judge juggler locksmith magician mason midwife miner optician photographer physicist "
    "poet potter printer sailor shepherd singer translator waiter welder"
  ),
  "game": (
    "chess tennis hockey cricket rugby bowling poker domino checkers badminton volleyball basketball "
    "football baseball softball handball golf archery fencing karate judo wrestling boxing rowing "
    "sailing surfing skiing skating curling climbing cycling jogging croquet bingo roulette solitaire "
    "backgammon mahjong scrabble charades billiards snooker squash lacrosse netball frisbee darts "
    "hopscotch dodgeball kayaking rafting snowboarding gymnastics yoga pilates juggling orienteering "
    "paintball parkour sudoku trivia polo triathlon"
  ),
  "color": (
    "teal crimson violet maroon beige turquoise scarlet navy amber indigo magenta ivory lavender "
    "burgundy khaki cyan ochre emerald sapphire charcoal bronze copper purple yellow pink brown gray"
  ),
  "time": " ".join(
    f"{hour}:{minute:02d}" for minute in (5, 15, 25, 35, 45, 55) for hour in range(1, 13)
  ),
  "price": " ".join(str(number) for number in range(11, 92)),
}
LEXICONS = {key: tuple(words.split()) for key, words in LEXICONS.items()}
KEYS = tuple(LEXICONS)
UNIT = {"price": " euros"}  # shown after the value

# Instructions; {keys} are the names of the facts. No instruction contains the name of a key.
INSTRUCTIONS = (
  "Write one or two sentences for a friend that use only these facts: {keys}.",
  "Tell a friend in one or two sentences about {keys} and nothing else.",
  "Turn only {keys} into one or two friendly sentences.",
  "In one or two plain sentences, pass on {keys}; leave out the rest.",
  "A friend wants to know {keys}. Answer in one or two sentences, no more.",
  "Write a short message with only {keys}.",
)

# The values of a lexicon are dealt into GROUPS. All values of a training note are of one group, and
# all values of a held-out note are of different groups: no two of them are in one training note.
GROUPS = 9
MIN_FACTS = 3
MAX_FACTS = 6
MAX_ITEMS = 7
TRAIN, HELD_OUT = "train", "held_out"

WORD = re.compile(r"\d+:\d\d(?!\d)|\d+|[^\W\d_]+(?:['’][^\W\d_]+)?")
ITEM = re.compile(rf"\b({'|'.join(KEYS)}): ([^;\n]+?)(?: euros)?(?=[;\n]|\.\n)")
SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)]|$)")
PROPER_END = re.compile(r"[.!?][\"'”’)]?$")
LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
LABEL = re.compile(rf"\b(?:{'|'.join(KEYS)})\s*:", re.IGNORECASE)
MARKUP = re.compile(r"[*_#|`{}\[\]<>~;=\\]+")
FIRST_PERSON = {"i", "i'm", "i'll", "i've", "i'd"}


class Note(NamedTuple):
  """The contents of a prompt: name -> value, in the order of the note."""

  facts: dict[str, str]
  distractors: dict[str, str]

  @property
  def values(self) -> set[str]:
    return {*self.facts.values(), *self.distractors.values()}


class GoldParts(NamedTuple):
  """The parts of gold for one reply."""

  gold: float
  coverage: float  # share of the facts that are named
  distractors: int  # distinct distractors that are named
  invented: int  # distinct names, numbers and lexicon words that are not in the prompt
  repeats: int  # 3-grams of words that occurred before
  outside: int  # number of words above or below the allowed range
  extra: int  # sentences beyond two
  marks: int  # marks of lists and markup
  ended: bool  # whether it ends like a sentence


# ---- words ----


def forms(value: str) -> set[str]:
  """The words that count as a value: the value and its plural, in lower case."""
  word = value.lower()
  return {word} if word[0].isdigit() else {word, f"{word}s", f"{word}es"}


VALUE_OF = {form: value for words in LEXICONS.values() for value in words for form in forms(value)}


def words_of(text: str) -> list[str]:
  """The words, numbers and times of a text, as written, without a possessive 's."""
  return [re.sub(r"['’]s$", "", word) for word in WORD.findall(text)]


def capitalised_inside(text: str) -> list[str]:
  """The capitalised words that do not begin a sentence, a line or a quotation."""
  found = []
  for match in WORD.finditer(text):
    before = text[: match.start()].rstrip(" ")
    begins = not before or before[-1] in '.!?:\n"“*-•('
    if match.group()[0].isupper() and not begins:
      found.append(re.sub(r"['’]s$", "", match.group()))
  return found


# ---- gold ----


def read_prompt(prompt: str) -> Note:
  """The note of a prompt.

  Raises:
    ValueError: it holds none.
  """
  items = dict(ITEM.findall(prompt))
  asked = set(re.findall(rf"\b({'|'.join(KEYS)})\b(?!:)", prompt))
  note = Note(
    {key: value for key, value in items.items() if key in asked},
    {key: value for key, value in items.items() if key not in asked},
  )
  if not note.facts:
    raise ValueError(f"no prompt of the notes task: {prompt!r}")
  return note


def invented_in(reply: str, prompt: str, note: Note) -> set[str]:
  """Distinct words of a reply that its prompt does not support: values of the lexicons, numbers, and
  capitalised words inside a sentence.
  """
  known = {word.lower() for word in words_of(prompt)} | FIRST_PERSON
  words = {word.lower() for word in words_of(reply)}
  values = {VALUE_OF[word] for word in words if word in VALUE_OF} - note.values
  numbers = {word for word in words if word[0].isdigit() and word not in known}
  names = {word.lower() for word in capitalised_inside(reply)} - known
  named = {form for value in note.values for form in forms(value)}
  return (
    {value.lower() for value in values}
    | numbers
    | {word for word in names - named if word not in VALUE_OF}
  )


def bare_list(reply: str) -> int:
  """The number of values beyond two in a row, with only commas between them."""
  row = 0
  extra = 0
  last = 0
  for match in WORD.finditer(reply):
    word = match.group().lower()
    between = reply[last : match.start()]
    last = match.end()
    if word == "euros":
      continue
    if word not in VALUE_OF and not word[0].isdigit():
      row = 0
      continue
    joined = row > 0 and "," in between and not between.strip(", \n")
    row = row + 1 if joined else 1
    extra += row > 2
  return extra


def marks_in(reply: str) -> int:
  """Marks of lists and markup: list lines, labels such as "guest:", runs of markup characters, and
  values in a bare list.
  """
  text = LIST_LINE.sub("", reply)
  inside = len(LABEL.findall(text)) + len(MARKUP.findall(text))
  return len(LIST_LINE.findall(reply)) + inside + bare_list(text)


def gold_parts(prompt: str, reply: str, truncated: bool = False) -> GoldParts:
  """The gold reward of a reply, and its parts.

    4 coverage - 0.8 distractors - 0.8 invented - 0.3 repeats - 0.15 outside - 0.5 extra
    - min(2, 0.4 marks) + 0.5 ended - truncated

  A value is named if the word occurs, in upper or lower case, also as a plural. `outside` counts
  words below facts + 2 and above 4 facts + 8. The best reply has 4.5.

  Args:
    truncated: whether the reply was cut off at the length limit.
  """
  note, reply = read_prompt(prompt), reply.strip()
  text = LIST_LINE.sub("", reply)
  words = [word.lower() for word in words_of(text)]
  named = {VALUE_OF[word] for word in words if word in VALUE_OF}
  grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
  low, high = len(note.facts) + 2, 4 * len(note.facts) + 8
  coverage = len(named & set(note.facts.values())) / len(note.facts)
  distractors = len(named & set(note.distractors.values()))
  invented = len(invented_in(text, prompt, note))
  repeats = len(grams) - len(set(grams))
  outside = max(0, low - len(words), len(words) - high)
  extra = max(0, len(SENTENCE_END.findall(text)) - 2)
  marks = marks_in(reply)
  ended = not truncated and bool(PROPER_END.search(reply))
  value = (
    4.0 * coverage
    - 0.8 * distractors
    - 0.8 * invented
    - 0.3 * repeats
    - 0.15 * outside
    - 0.5 * extra
    - min(2.0, 0.4 * marks)
    + 0.5 * ended
    - 1.0 * truncated
  )
  return GoldParts(
    value, coverage, distractors, invented, repeats, outside, extra, marks, bool(ended)
  )


def all_parts(rows: Iterable[dict], formula: str = "") -> list[GoldParts]:
  """`gold_parts` of rows with prompt, response and truncated.

  Args:
    formula: config.gold.formula, the file of a formula that takes the place of this one.
  """
  texts = [(row["prompt"], row["response"], row.get("truncated", False)) for row in rows]
  parts = [gold_parts(*text) for text in texts]
  if not formula:
    return parts
  values = own.values(formula, ((prompt, reply, not cut) for prompt, reply, cut in texts))
  return [part._replace(gold=float(value)) for part, value in zip(parts, values)]


def gold(rows: Iterable[dict], formula: str = "") -> np.ndarray:
  """The gold reward of rows with prompt, response and truncated, f64[N]."""
  return np.array([part.gold for part in all_parts(rows, formula)], float)


# ---- prompts ----


def draw_note(rng: np.random.Generator, split: str) -> Note:
  """One note; see GROUPS."""
  num_facts = int(rng.integers(MIN_FACTS, MAX_FACTS + 1))
  num_items = num_facts + int(rng.integers(1, min(3, MAX_ITEMS - num_facts) + 1))
  keys = [KEYS[i] for i in rng.permutation(len(KEYS))[:num_items]]
  groups = rng.permutation(GROUPS)[:num_items]
  if split == TRAIN:
    groups = np.full(num_items, groups[0])
  items = {}
  for key, group in zip(keys, groups):
    choices = LEXICONS[key][group::GROUPS]
    items[key] = choices[rng.integers(len(choices))]
  facts = set(keys[:num_facts])
  shuffled = [keys[i] for i in rng.permutation(num_items)]
  return Note(
    {key: items[key] for key in shuffled if key in facts},
    {key: items[key] for key in shuffled if key not in facts},
  )


def write_prompt(rng: np.random.Generator, note: Note) -> str:
  """The note and one of the instructions; the names in the instruction are in a separate order."""
  items = {**note.facts, **note.distractors}
  keys = [list(items)[i] for i in rng.permutation(len(items))]
  shown = "; ".join(f"{key}: {items[key]}{UNIT.get(key, '')}" for key in keys)
  asked = [list(note.facts)[i] for i in rng.permutation(len(note.facts))]
  listed = ", ".join(asked[:-1]) + f" and {asked[-1]}"
  instruction = INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))].format(keys=listed)
  return f"Note: {shown}.\n{instruction}"


def prompts(seed: int, stream: int, count: int, split: str = TRAIN) -> list[str]:
  """`count` different prompts, a function of only the arguments."""
  rng = np.random.default_rng([seed, stream, 23])
  found: dict[str, None] = {}
  while len(found) < count:
    found[write_prompt(rng, draw_note(rng, split))] = None
  return list(found)


# ---- demonstrations ----

# Clauses about a value, of which sentences are made.
CLAUSES = {
  "guest": ("{} is coming", "{} will be there", "we will see {}"),
  "town": ("we meet in {}", "it is in {}", "we are going to {}"),
  "food": ("there will be {}", "I will bring some {}", "we will eat {}"),
  "pet": ("the {} comes along", "you can meet the {}", "there is a pet {}"),
  "gift": ("the gift is a {}", "please bring the {}", "I got a {}"),
  "job": ("the {} will help", "I asked the {}", "a {} joins us"),
  "game": ("we will play {}", "{} is the plan", "we can try {}"),
  "color": ("everything is {}", "wear something {}", "the color is {}"),
  "time": ("it starts at {}", "be there at {}", "we begin at {}"),
  "price": ("it costs {} euros", "the price is {} euros", "you pay {} euros"),
}
FILLERS = (
  "I hope you are well.",
  "It will be great fun!",
  "Let me know what you think.",
  "I can't wait to see you.",
)


def clause(rng: np.random.Generator, key: str, value: str) -> str:
  return CLAUSES[key][rng.integers(len(CLAUSES[key]))].format(value)


def sentence(clauses: list[str]) -> str:
  """Clauses as one sentence."""
  joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
  return joined[0].upper() + joined[1:]


def demonstrations(seed: int, stream: int, count: int) -> list[dict]:
  """Rows {prompt, response} of imperfect writers.

  A writer has a quality q ~ U(0, 1). A fact is named with probability 0.5 + 0.4 q and a distractor
  with 0.3 - 0.2 q. With 0.15 a value is invented, with 0.2 a filler sentence follows, with 0.1 the
  reply is a bare list, and with 0.1 the full stop is missing.
  """
  rng, rows = np.random.default_rng([seed, stream, 29]), []
  for prompt in prompts(seed, stream, count):
    note, quality = read_prompt(prompt), rng.uniform()
    items = [item for item in note.facts.items() if rng.uniform() < 0.5 + 0.4 * quality]
    items += [item for item in note.distractors.items() if rng.uniform() < 0.3 - 0.2 * quality]
    if rng.uniform() < 0.15:
      key = KEYS[rng.integers(len(KEYS))]
      items.append((key, LEXICONS[key][rng.integers(len(LEXICONS[key]))]))
    items = [items[i] for i in rng.permutation(len(items))] or [next(iter(note.facts.items()))]
    rows.append({"prompt": prompt, "response": write_reply(rng, items)})
  return rows


def write_reply(rng: np.random.Generator, items: list[tuple[str, str]]) -> str:
  """A writer's reply with the given values."""
  end = "" if rng.uniform() < 0.1 else "."
  if rng.uniform() < 0.1:
    return ", ".join(f"{value}{UNIT.get(key, '')}" for key, value in items) + end
  clauses = [clause(rng, *item) for item in items]
  half = -(-len(clauses) // 2) if len(clauses) > 2 else len(clauses)
  parts = [sentence(part) for part in (clauses[:half], clauses[half:]) if part]
  reply = ". ".join(parts) + end
  if rng.uniform() < 0.2:
    reply += (" " if end else ". ") + FILLERS[rng.integers(len(FILLERS))]
  return reply
