"""What fine-tuning a model would take of a card's memory, from its config alone, and what to do with that card."""
