"""What one answer took, for tests of what is made of it."""

from edge_agent.metrics.recent import Took

TOOK = Took(
    queue_s=0.02,
    first_token_s=7.0,
    request_s=30.0,
    per_token_s=0.4,
    input_tokens=100,
    output_tokens=16,
    cached_tokens=64,
)
