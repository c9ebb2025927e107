"""Input-adaptive bit-widths: an actor reads each input and chooses the width of every site, sample by sample.

The published framework is DQMQ (Wang, Guo, Guo and Zhang, 2023); what is here is our reconstruction of it, see
``docs/methods/dqmq.md``.
"""
