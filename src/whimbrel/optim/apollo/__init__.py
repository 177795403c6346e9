"""APOLLO: the gradient scaled slice by slice as Adam scales a random projection of it."""
