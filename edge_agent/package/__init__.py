"""Model packages: references, manifests, MLmodel, options, needs, and which code may run."""
