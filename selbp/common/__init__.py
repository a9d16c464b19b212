"""What the cut and the training step share: batches and their samples, hooks, guards, state, the keep rule."""
