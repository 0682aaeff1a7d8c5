"""GGUF, the file format of llama.cpp: model, tokenizer and chat template in one file."""
