"""Pure functions on tensors: no models, no settings, no processes. Needs torch alone."""
