"""What a checkpoint may attend to, in evaluation and in serving."""
