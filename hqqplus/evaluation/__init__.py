"""Before and after: perplexity, samples, and the report that shows both.

Import from the modules (`perplexity`, `samples`, `report`); nothing is imported here, so that `report.environment`
costs no torch.
"""
