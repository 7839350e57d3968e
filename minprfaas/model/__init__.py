"""The transformer: mixers, MLPs, checkpoints, tokenizer. Chapters 01 and 02."""
