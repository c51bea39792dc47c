"""verl-style supervised fine-tuning of agents: collect episodes, train, export, measure."""

__version__ = "0.1.0"
