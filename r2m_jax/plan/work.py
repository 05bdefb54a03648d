"""FLOPs and bytes that a step moves, phase by phase, counted from the shapes.

A multiply-add is two FLOPs. Only matmuls are counted, but everything that the program computes:
attention over the full square of positions (masks save nothing) unless a kernel skips masked
blocks, a prompt once for the responses that pass through together, recomputation in the backward
pass, and decoding over every slot of the cache unless a kernel reads only the used ones. Rows have
the maximum length unless `config.plan.lengths` gives their lengths. `tests/plan/test_plan.py`
compares these sums with the matmuls in the program's own jaxpr.
"""

import dataclasses
import math

import jax.numpy as jnp

from r2m_jax.algorithm.objective import kl_estimator
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.attention import choose
from r2m_jax.models.kernels.slots import slots_fit
from r2m_jax.models.kernels.splash import BLOCK
from r2m_jax.parallel.rows import dealt
from r2m_jax.plan.lengths import Work, expected
from r2m_jax.plan.sizes import Sizes, baseline_of, fed_states, reads_feedback

ROLLOUT = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Phase:
  name: str
  flops: float  # over all chips
  moved: float  # bytes to and from one chip's memory
  links: float  # bytes out of one chip, as expected; a compiled plan counts the real ones

  def seconds(self, chip, chips: int) -> tuple[float, str]:
    """The least time and the limiting resource, without links."""
    compute, memory = self.flops / chips / chip.flops, self.moved / chip.memory_rate
    return max((compute, "compute"), (memory, "memory"))


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sizes of the mesh."""

  data: int
  fsdp: int
  tensor: int

  @property
  def shards(self) -> int:
    return self.data * self.fsdp

  @property
  def chips(self) -> int:
    return self.shards * self.tensor


def layer_weights(arch: ArchConfig) -> int:
  """Number of elements in the matrices of one layer."""
  heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
  attention = arch.hidden_size * (heads + 2 * kv) + heads * arch.hidden_size
  return attention + (3 if arch.gated_mlp else 2) * arch.hidden_size * arch.intermediate_size


def vocabulary(arch: ArchConfig) -> int:
  """Number of elements in the matrix that computes logits."""
  return arch.hidden_size * arch.vocab_size


def fused_attention(config, arch: ArchConfig, platform: str) -> bool:
  """Whether passes over whole rows use a kernel that stores no square of logits and skips causally
  masked blocks.
  """
  return choose(config.attention, platform, arch, config.dtype) in ("splash", "cudnn")


def in_slots(config, arch: ArchConfig, platform: str) -> bool:
  """Whether decoding reads only the slots of the cache that a row sees."""
  return slots_fit(choose(config.attention, platform, arch, config.dtype), arch)


def cache_slots(config, sizes: Sizes) -> int:
  """Slots of the cache of all rows at the end of a rollout; a prompt's slots count once if its rows
  share them.
  """
  if baseline_of(config) == "greedy":
    return sizes.rows * sizes.length
  return sizes.rows * sizes.response_length + sizes.prompts * sizes.prompt_length


def blocks_flops(
  arch: ArchConfig, rows: float, length: int, keys: float, share: float = 1.0
) -> float:
  """One forward pass through all layers, without logits. A `share` of the tokens is multiplied with
  weights, and every token with this number of `keys`.
  """
  squares = 4 * keys * arch.num_heads * arch.head_dim
  return rows * length * arch.num_layers * (2 * layer_weights(arch) * share + squares)


def logits_flops(arch: ArchConfig, positions: float) -> float:
  return 2 * positions * vocabulary(arch)


def head_flops(config, sizes: Sizes) -> float:
  """One forward pass of cross-attention and phi over all rows (eqs. 3 and 4), whose keys and values
  are never computed.
  """
  rows = sizes.rows
  reward = sizes.reward_arch.hidden_size
  width = config.r2m.attention_dim
  phi = 2 * rows * reward * config.reward.ensemble
  if not reads_feedback(config):
    return phi
  length, fed = fed_states(config, sizes)
  return phi + 4 * rows * (reward * width + fed * width + config.r2m.num_heads * length * fed)


def trained_numbers(config, arch: ArchConfig) -> int:
  """Number of elements with a gradient; adapters are negligible."""
  tables = 2 if arch.untied_head else 1
  return (
    0 if config.lora.rank else arch.num_layers * layer_weights(arch) + vocabulary(arch) * tables
  )


def phases_of(
  config, sizes: Sizes, layout: Layout, platform: str, work: Work | None = None
) -> list[Phase]:
  """The step's phases in order; the first ones are the rollout's (`ROLLOUT`), the others
  learn's. `work` None: by config.plan.lengths.
  """
  count = _Count(config, sizes, layout, platform, work)
  phases = [
    count.prefill(),
    count.decode(),
    count.feedback("feedback and log-probs"),
    count.feedback("reference"),
  ]
  phases += [count.backbone(), count.policy_update()]
  if baseline_of(config) == "critic":
    phases.append(count.critic())
  return phases + [count.reward_head()]


def update_tokens(config, sizes: Sizes, layout: Layout, platform: str) -> float:
  """The maximum tokens of a micro-batch in the policy's layers on a chip."""
  count = _Count(config, sizes, layout, platform, Work())
  spans = count.spans(sizes.arch, count.trained_rows(), sizes.length, count.trained_group)
  return sum(rows * length for rows, length, _ in spans) / count.parts / layout.shards


class _Count:
  def __init__(self, config, sizes: Sizes, layout: Layout, platform: str, work: Work | None = None):
    self.config = config
    self.sizes = sizes
    self.layout = layout
    self.attention = {
      arch: choose(config.attention, platform, arch, config.dtype)
      for arch in (sizes.arch, sizes.reward_arch)
    }
    self.in_slots = in_slots(config, sizes.arch, platform)
    self.slots = cache_slots(config, sizes)
    self.width = jnp.dtype(config.dtype).itemsize  # bytes per element in the computation
    self.stored = jnp.dtype(config.param_dtype).itemsize  # bytes of a parameter
    self.again = int(
      config.remat == "full"
    )  # passes through whole layers that the backward pass recomputes
    copies = self.copies(sizes.arch, sizes.rows, sizes.length, self.group)
    self.work = work or expected(config, sizes, layout.shards, self.parts, copies)

  def copies(self, arch: ArchConfig, rows: int, length: int, group: int) -> int:
    """How many of `group` neighbours with one prompt share one pass of the prompt through the
    layers.
    """
    if self.attention[arch] == "splash" and self.kernel(arch, length):
      return 1
    of_device, left = divmod(rows, self.parts * self.layout.shards)
    return 1 if left else math.gcd(group, of_device)

  def spans(
    self, arch: ArchConfig, rows: int, length: int, group: int = 1
  ) -> list[tuple[float, int, float]]:
    """(rows, tokens of each, keys with which they are multiplied) of a pass over whole rows, with
    `group` neighbours per prompt. A kernel that skips masked blocks computes half the square.
    """
    fused = self.kernel(arch, length)

    def own(length):
      return length / 2 if fused else length

    copies = self.copies(arch, rows, length, group)
    if copies == 1:
      return [(rows, length, own(length))]
    prompt, response = self.sizes.prompt_length, self.sizes.response_length
    return [(rows / copies, prompt, own(prompt)), (rows, response, prompt + own(response))]

  def blocks(self, arch: ArchConfig, rows: int, length: int, group: int = 1) -> float:
    """FLOPs of a forward pass over whole rows, packed."""
    share = self.work.share
    return sum(blocks_flops(arch, *span, share) for span in self.spans(arch, rows, length, group))

  def squares_again(self, arch: ArchConfig, rows: int, length: int) -> float:
    """FLOPs of attention that the backward pass of an update recomputes if matmuls with weights are
    kept.
    """
    if self.config.remat != "dots":
      return 0.0
    group, weights = self.trained_group, 2 * arch.num_layers * layer_weights(arch)
    tokens = sum(rows * length for rows, length, _ in self.spans(arch, rows, length, group))
    return self.blocks(arch, rows, length, group) - weights * tokens * self.work.share

  def kernel(self, arch: ArchConfig, length: int) -> bool:
    """Whether rows of this length go through the kernel."""
    return self.attention[arch] == "cudnn" or self.attention[arch] == "splash" and length >= BLOCK

  def pass_bytes(self, arch: ArchConfig, spans, parts: int, share: float = 1.0) -> float:
    """Memory traffic of one forward pass on a chip: weights once for each part, every matmul's
    input and output once, for a `share` of the tokens.
    """
    tensor = self.layout.tensor
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    streams = 6 * arch.hidden_size + 2 * (
      2 * heads + 2 * kv + (3 if arch.gated_mlp else 2) * arch.intermediate_size
    )

    # float32 logits written, read for the softmax, weights read
    def squares(length, keys):
      return 0 if self.kernel(arch, length) else 3 * 4 * arch.num_heads * keys

    moved = sum(
      rows * length * (streams * self.width * share + squares(length, keys))
      for rows, length, keys in spans
    )
    weights = parts * arch.num_layers * layer_weights(arch) * self.width / tensor
    return weights + moved * arch.num_layers / self.layout.shards / tensor

  def logit_bytes(self, arch: ArchConfig, positions: int, parts: int) -> float:
    """The unembedding once for each part, and float32 logits written and read once."""
    return (
      parts * vocabulary(arch) * self.width + 8 * arch.vocab_size * positions / self.layout.shards
    ) / self.layout.tensor

  def gathered(self, arch: ArchConfig, passes: float, logits: bool = True) -> float:
    """Bytes out of a chip for gathering all weights over fsdp this many times."""
    numbers = arch.num_layers * layer_weights(arch) + vocabulary(arch) * logits
    return (
      passes
      * numbers
      * self.stored
      / self.layout.tensor
      * (self.layout.fsdp - 1)
      / self.layout.fsdp
    )

  def reduced(self, arch: ArchConfig, spans, passes: float) -> float:
    """Bytes out of a chip for adding partial sums over `tensor`, twice per layer."""
    tensor = self.layout.tensor
    tokens = sum(rows * length for rows, length, _ in spans) / self.layout.shards
    return (
      passes
      * 2
      * 2
      * (tensor - 1)
      / tensor
      * tokens
      * arch.num_layers
      * arch.hidden_size
      * self.width
    )

  @property
  def parts(self) -> int:
    return self.config.ppo.minibatches * self.config.ppo.accumulation

  @property
  def group(self) -> int:
    """Number of neighbouring rows with one prompt in passes without a gradient; 1 if there are
    greedy rows.
    """
    return self.config.rollout.group_size if self.trained_rows() == self.sizes.rows else 1

  @property
  def trained_group(self) -> int:
    """The same for updates."""
    return dealt(self.config.rollout.group_size, self.config.ppo.minibatches)

  def prefill(self) -> Phase:
    s = self.sizes
    arch = self.sizes.arch
    waves = self.config.rollout.waves
    spans = self.spans(arch, s.prompts, s.prompt_length)
    blocks = sum(blocks_flops(arch, *span) for span in spans)
    spans = [(s.prompts, s.prompt_length, s.prompt_length)]
    return Phase(
      "prefill",
      blocks + logits_flops(arch, s.rows),
      self.pass_bytes(arch, spans, waves) + self.logit_bytes(arch, s.rows, waves),
      self.gathered(arch, waves) + self.reduced(arch, spans, 1),
    )

  def decode(self) -> Phase:
    s = self.sizes
    arch = self.sizes.arch
    waves = self.config.rollout.waves
    tokens = s.response_length * self.work.longest - 1  # the first one comes with the prefill
    rows = s.rows * self.work.alive
    # averaged over all tokens, half of the response is there; only a kernel skips the other half
    # alone
    unread = s.response_length * (1 - self.work.longest / 2) if self.in_slots else 0
    cache = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * self.width / self.layout.chips
    cache *= (self.slots - s.rows * unread) * self.work.alive
    layers = self.pass_bytes(arch, [(rows, 1, s.length)], waves)
    logits = self.logit_bytes(arch, 3 * rows, waves)
    one = layers / self.layout.fsdp + logits + cache
    return Phase(
      "decode",
      tokens * (blocks_flops(arch, rows, 1, s.length - unread) + logits_flops(arch, rows)),
      tokens * one,
      tokens * self.decode_links(),
    )

  def decode_links(self) -> float:
    """Bytes out of a chip for one token of every row: weights stay in place, and sums over fsdp and
    tensor are completed.
    """
    arch, layout = self.sizes.arch, self.layout
    rows = self.sizes.rows / layout.data
    fsdp = layout.fsdp
    tensor = layout.tensor
    rows *= self.work.alive
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    wide = (heads + 2 * kv + (2 if arch.gated_mlp else 1) * arch.intermediate_size) / tensor
    over_fsdp = (
      2 * (fsdp - 1) / fsdp * (arch.num_layers * wide * self.width + arch.vocab_size / tensor * 4)
    )
    over_tensor = (
      2 * (tensor - 1) / tensor * arch.num_layers * 2 * arch.hidden_size / fsdp * self.width
    )
    return rows * (over_fsdp + over_tensor)

  def feedback(self, name: str) -> Phase:
    s = self.sizes
    arch = self.sizes.arch
    share = self.work.share
    positions = s.rows * s.response_length * share
    spans = self.spans(arch, s.rows, s.length, self.group)
    return Phase(
      name,
      self.blocks(arch, s.rows, s.length, self.group) + logits_flops(arch, positions),
      self.pass_bytes(arch, spans, self.parts, share)
      + self.logit_bytes(arch, positions, self.parts),
      self.gathered(arch, self.parts) + self.reduced(arch, spans, share),
    )

  def backbone(self) -> Phase:
    s, arch = self.sizes, self.sizes.reward_arch
    group = self.group if s.same_tokens else 1
    spans = self.spans(arch, s.rows, s.reward_length, group)
    return Phase(
      "reward backbone",
      self.blocks(arch, s.rows, s.reward_length, group),
      self.pass_bytes(arch, spans, self.parts, self.work.share),
      self.gathered(arch, self.parts, logits=False) + self.reduced(arch, spans, self.work.share),
    )

  def trained_rows(self) -> int:
    """Rows of the update, without the greedy ones."""
    return self.sizes.prompts * self.config.rollout.group_size

  def policy_update(self) -> Phase:
    s = self.sizes
    arch = self.sizes.arch
    config = self.config
    rows = self.trained_rows()
    epochs = config.ppo.epochs
    parts = self.parts
    chunked = 0 < config.logits_chunk < s.response_length * arch.vocab_size
    share = self.work.share
    positions = rows * s.response_length * share
    # forward, twice as much backward, and once what the backward pass recomputes: all but a layer's
    # last sums
    last = (
      2
      * arch.hidden_size
      * (arch.intermediate_size + arch.parallel_residual * arch.num_heads * arch.head_dim)
    )
    # frozen weights have no gradient; matmuls of the adapters are not counted
    backward = 1 if config.lora.rank else 2
    spans = self.spans(arch, rows, s.length, self.trained_group)
    layers = self.blocks(arch, rows, s.length, self.trained_group) * (1 + backward + self.again)
    tokens = share * sum(rows * length for rows, length, _ in spans)
    layers -= self.again * tokens * arch.num_layers * last
    layers += self.squares_again(arch, rows, s.length)
    logits = logits_flops(arch, positions) * (1 + backward + chunked)
    if kl_estimator(config, arch.vocab_size) == "exact":
      logits += logits_flops(arch, positions) * (
        1 + chunked
      )  # of the reference, without a gradient
    numbers = trained_numbers(config, arch)
    own = numbers / (self.layout.fsdp * self.layout.tensor)
    moment = jnp.dtype(config.policy.moment_dtype).itemsize
    adam = own * (
      2 * self.stored + 4 + 4 * moment
    )  # parameter and moments read and written, gradient read
    reduction = (
      numbers * self.stored / self.layout.tensor * (self.layout.fsdp - 1) / self.layout.fsdp * parts
    )
    reduction += 2 * own * self.stored * (self.layout.data - 1) / self.layout.data
    return Phase(
      "policy update",
      epochs * (layers + logits),
      epochs
      * (
        (3 + self.again) * self.pass_bytes(arch, spans, parts, share)
        + (3 + chunked) * self.logit_bytes(arch, positions, parts)
        + config.ppo.minibatches * adam
      ),
      epochs
      * (
        self.gathered(arch, 2 * parts)
        + reduction
        + self.reduced(arch, spans, share * (3 + self.again))
      ),
    )

  def critic(self) -> Phase:
    """PPO's critic: one pass for the old values, then epochs of updates."""
    s = self.sizes
    config = self.config
    rows = self.trained_rows()
    share = self.work.share
    arch = s.reward_arch if config.critic.init == "reward" else s.arch
    groups = {config.rollout.group_size: 1}  # for neighbours with one prompt
    groups[self.trained_group] = groups.get(self.trained_group, 0) + config.ppo.epochs * (
      3 + self.again
    )
    spans = {group: self.spans(arch, rows, s.length, group) for group in groups}
    head = 2 * rows * s.length * arch.hidden_size
    return Phase(
      "critic",
      sum(n * (self.blocks(arch, rows, s.length, group) + head) for group, n in groups.items())
      + config.ppo.epochs * self.squares_again(arch, rows, s.length),
      sum(
        n * self.pass_bytes(arch, spans[group], self.parts, share) for group, n in groups.items()
      ),
      self.gathered(arch, self.parts * (1 + 3 * config.ppo.epochs), logits=False)
      + sum(self.reduced(arch, spans[group], n * share) for group, n in groups.items()),
    )

  def reward_head(self) -> Phase:
    """Annotation, and the update on refreshed feedback: forward, and backward to the weights and to
    their inputs.
    """
    config, s = self.config, self.sizes
    passes = 1 + (3 if VARIANTS[config.variant].trained else 0)
    tokens = s.rows * s.length / self.layout.shards
    width = config.r2m.attention_dim
    fed = reads_feedback(config)
    # h is read for the logits and for the sum, and again for each in the backward pass
    moved = (
      (2 + 2 * VARIANTS[config.variant].trained) * tokens * s.arch.hidden_size * self.width * fed
    )
    weights = 2 * (s.arch.hidden_size + s.reward_arch.hidden_size) * width * 4 * fed
    links = passes * weights * (self.layout.fsdp - 1) / self.layout.fsdp / self.layout.tensor
    return Phase("reward head", passes * head_flops(config, s), moved + passes * weights, links)
