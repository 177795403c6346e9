"""Two coupled states, the ground of RLA and RDN: the second is fitted to what the first leaves over.

The two differ only in the rule by which a state is written (`delta`), so all else is here once. Derivation: README.md
beside `whimbrel.scan.chunks`.
"""
