"""Model packages: references, manifests, MLmodel, options, needs, signatures, and which code may run."""
