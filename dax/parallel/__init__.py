"""Many GPUs for one clip: guidance branches and shares of the tokens on different ranks, the same result as on one."""
