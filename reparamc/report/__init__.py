"""What was done to a model, as data, as text and as a record."""
