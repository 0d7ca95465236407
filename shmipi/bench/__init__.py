"""Measuring: latency, throughput, boot and broadcast, beside the physical limits.

Each module that ``shmipi.names.BENCHES`` lists has ``Options`` and a ``run()`` that
returns the document of ``shmipi bench`` of its name::

    from shmipi.bench import latency

    found = latency.run(latency.Options(calls=2_000, doorbells=("none", "futex")))

What is timed runs on two pinned CPUs of a machine; the host only starts it and sleeps.
"""
