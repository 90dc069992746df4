"""How much better did the model get: suites, comparison, gate, report."""
