"""Step 2, distill: a Dirichlet-process mixture over the failing codes, and draws from its components."""
