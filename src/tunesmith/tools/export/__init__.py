"""A trained model written for others: merged, or in the formats of programs that serve it.

Weights are read band by band from the base's files and the adapter's, changed and written; no more
than a band of one matrix is in memory.
"""
