"""`apply`: install a plan on a model, and take it off."""
