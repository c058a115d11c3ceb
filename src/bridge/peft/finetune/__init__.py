"""What `bridge-peft finetune` is made of: data, run record, trainer, report."""
