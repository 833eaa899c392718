"""What a model's answers are worth: figures with their intervals."""
