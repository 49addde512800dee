"""Training in mixed precision with native `torch.amp`: the loop, its numerical health, and what it hands over to conversion."""
