"""Accounting of finished requests: metrics, access log, tokens, the usage ledger."""
