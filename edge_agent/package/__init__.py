"""What a package is, and what it may do: references, manifests, MLmodel, options, needs and trust."""
