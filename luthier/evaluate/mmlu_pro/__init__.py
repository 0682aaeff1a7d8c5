"""MMLU-Pro, asked and scored as its authors publish it (Wang et al. 2024, https://arxiv.org/abs/2406.01574)."""
