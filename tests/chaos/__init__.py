"""Kill a training run at random moments and see that it ends as if nobody had."""
