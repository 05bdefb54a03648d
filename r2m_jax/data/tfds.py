"""TFDS data sets of preferences and summaries, in array_record files: built and read without
TensorFlow.

  tfds:ultrafeedback_binarized                      Cui et al. 2023, in the binarised form of Zephyr
  tfds:hh_rlhf, tfds:hh_rlhf/helpful_base, ...      Bai et al. 2022
  tfds:tldr                                         Stiennon et al. 2020: posts with their authors' summaries

A data set is prepared when it is first read: from the files of config.data.root if it is given, in
any form of data/forms.py, and otherwise from the hub. Afterwards only config.data.tfds_dir is read.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from r2m_jax.data.checked import BadRows, good_rows, hub_files
from r2m_jax.data.files import Record, find_files, of_split, read_file
from r2m_jax.data.jsonl import DataError
from r2m_jax.parallel import hosts

NAME = re.compile(
  r"\w+(/\w[\w.-]*)?(:\d+\.\d+\.\d+)?"
)  # not a path, not an address, no foreign code


@dataclasses.dataclass
class Source(tfds.core.BuilderConfig):
  """A data set, or a part of one, on the hub."""

  hub: str = ""  # OWNER/NAME or OWNER/NAME/FOLDER
  splits: tuple[tuple[str, str], ...] = (
    ("train", "train"),
    ("test", "test"),
  )  # split name of ours, and of the files


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Rows of data.forms as a TFDS data set.

  Args of `tfds.builder(name, ...)`: root: folder of local files to prepare from, "" for the hub. A
  file belongs to the split with which its name, or the name of a folder above it, begins. If no
  file names a split, all are "train".
    max_bad_share: largest share of bad rows; more are an error.
  """

  VERSION = tfds.core.Version("1.0.0")
  NEED, FIELDS = "pair", ("chosen", "rejected")

  def __init__(self, *, root: str = "", max_bad_share: float = 0.01, **kwargs):
    self._root, self._max_bad_share = root, max_bad_share
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
    fields = {
      "prompt": tfds.features.Sequence(message),
      **dict.fromkeys(self.FIELDS, tfds.features.Text()),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(fields))

  def _split_generators(self, dl_manager):
    splits = (
      self._local()
      if self._root
      else {
        ours: hub_files(self.builder_config.hub, theirs)
        for ours, theirs in self.builder_config.splits
      }
    )
    return {split: self._generate_examples(files) for split, files in splits.items()}

  def _local(self) -> dict[str, list[Path]]:
    folder, files = Path(self._root).expanduser(), find_files(self._root)
    folder = folder if folder.is_dir() else folder.parent
    found = {
      ours: list(dict.fromkeys(of_split(files, ours, folder) + of_split(files, theirs, folder)))
      for ours, theirs in self.builder_config.splits
    }
    return {split: files for split, files in found.items() if files} or {"train": files}

  def _generate_examples(self, files):
    bad, key = BadRows(f"tfds:{self.name}"), 0
    for file in files:
      for row in good_rows(read_file(file), self.NEED, bad):
        prompt = row["prompt"]
        if isinstance(prompt, str):
          prompt = [{"role": "user", "content": prompt}]
        yield key, {"prompt": prompt, **{field: row[field] for field in self.FIELDS}}
        key += 1
    bad.check(self._max_bad_share)
    print(f"data     {bad.summary()}")


class UltrafeedbackBinarized(Rows):
  """UltraFeedback's best-scored reply and one of the others. Prompts of one user turn."""

  RELEASE_NOTES = {"1.0.0": "HuggingFaceH4/ultrafeedback_binarized, its preference splits."}
  BUILDER_CONFIGS = [
    Source(
      name="default",
      hub="HuggingFaceH4/ultrafeedback_binarized",
      splits=(("train", "train_prefs"), ("test", "test_prefs")),
    )
  ]


class HhRlhf(Rows):
  """Crowdworkers' choices between two replies of an assistant."""

  RELEASE_NOTES = {"1.0.0": "Anthropic/hh-rlhf."}
  BUILDER_CONFIGS = [
    Source(name=name.replace("-", "_"), hub=f"Anthropic/hh-rlhf/{name}")
    for name in ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
  ]


class Tldr(Rows):
  """Reddit posts and the summaries that their authors wrote."""

  RELEASE_NOTES = {"1.0.0": "trl-lib/tldr."}
  NEED, FIELDS = "response", ("response",)
  BUILDER_CONFIGS = [
    Source(
      name="default",
      hub="trl-lib/tldr",
      splits=(("train", "train"), ("validation", "validation"), ("test", "test")),
    )
  ]


BUILDERS = {"ultrafeedback_binarized": UltrafeedbackBinarized, "hh_rlhf": HhRlhf, "tldr": Tldr}


def records(name: str, data) -> Iterator[Record]:
  """The rows of `tfds:name`, which is prepared first if necessary. Other TFDS data sets must
  already be prepared.

  Args:
    data: config.data: root, split, tfds_dir, max_bad_share.
  """
  if not NAME.fullmatch(name) or ".." in name:
    raise DataError(
      f"config.data.name is tfds:{name}: give tfds:NAME, tfds:NAME/CONFIG or either with :1.0.0 "
      "after it"
    )
  (base, _, part), split = name.partition("/"), data.split
  kwargs = dict(data_dir=data.tfds_dir or None)
  try:
    if base in BUILDERS:
      builder = BUILDERS[base](
        root=data.root, max_bad_share=data.max_bad_share, config=part or None, **kwargs
      )
      downloads = tfds.download.DownloadConfig(try_download_gcs=False)
      hosts.on_first(lambda: builder.download_and_prepare(download_config=downloads))
      builder.download_and_prepare(
        download_config=downloads
      )  # already there, or a disk of this host
    else:
      builder = tfds.builder(name, file_format="array_record", **kwargs)
    source = builder.as_data_source(split=split)
  except DataError:
    raise
  except Exception as error:  # noqa: BLE001  many kinds, for a wrong name, split or folder
    reason = " ".join(str(error).split())[:300]
    raise DataError(
      f"tfds:{name}, split {split!r}, cannot be read: {reason}; correct the name or "
      "config.data.split, or set config.data.tfds_dir to where it was prepared"
    ) from None
  try:
    count = len(source)
  except Exception as error:  # noqa: BLE001  array_record opens its files here
    raise unreadable(name, split, builder.data_dir, error) from None
  for number in range(count):
    try:
      value = _plain(source[number])
    except Exception as error:  # noqa: BLE001  damaged files raise errors of several kinds
      raise unreadable(name, split, builder.data_dir, error) from None
    yield Record(value, f"tfds:{name}/{split}", number + 1)


def unreadable(name: str, split: str, folder, error: Exception) -> DataError:
  """The message for a prepared data set whose files are damaged."""
  reason = " ".join(str(error).split())[:300]
  return DataError(
    f"tfds:{name}, split {split!r}, cannot be read: {reason}; its files are in {folder}: bring "
    "them back from a copy, or delete that folder and it is prepared again"
  )


def _plain(value):
  """Bytes as text, and TFDS's list of messages stored by column as a list of messages."""
  if isinstance(value, dict):
    value = {key: _plain(x) for key, x in value.items()}
    if set(value) == {"role", "content"} and isinstance(value["role"], list):
      return [
        {"role": role, "content": content} for role, content in zip(value["role"], value["content"])
      ]
    return value
  if isinstance(value, (list, np.ndarray)):
    return [_plain(x) for x in value]
  return value.decode("utf-8") if isinstance(value, bytes) else value
