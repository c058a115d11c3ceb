"""How A and B are sharded, derived from the base's layout: FSDP2, tensor parallel, Megatron."""
