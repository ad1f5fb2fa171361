"""The words of every room: tasks, models, algorithms, stacked pytrees, randomness, fields, errors."""
