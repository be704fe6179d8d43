"""Which way to train, and how to cut: training runs by the hundred, whose data are kept in this folder."""
