"""Which version answers: candidates, the gate, exchange, rollback, quarantine and memory."""
