"""What written files are worth: perplexity, probes, tasks, and limits on them."""
