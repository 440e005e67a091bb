"""What is taken out of the data before training, and how it is divided."""
