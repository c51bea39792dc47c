"""What one GPU reaches: ceilings, attention, contenders, and this trainer with its levers off."""
