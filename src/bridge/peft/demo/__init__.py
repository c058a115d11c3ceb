"""The embedded default of `bridge-peft finetune`: a small base model and a task to teach it."""
