"""What happens at each call of a task: checks of the batch and of the model, and the graph that fits both."""
