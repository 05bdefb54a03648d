"""A run's checkpoint as a Hugging Face folder."""


def run(config):
  raise NotImplementedError
