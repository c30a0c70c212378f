"""The choice of formats and ranks: options, measured times, losses, one choice for all layers."""
