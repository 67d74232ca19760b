"""The benchmark suite of fastnn: ``python -m benchmarks``.

=============== =====================================================================
``cases``       what is measured, declared once
``peers``       the implementations that are measured against one another
``check``       agreement with float64, before anything is timed
``runner``      the measurement of the ops
``training``    the examples, trained with ``torch.nn`` and with ``fastnn.nn``
``record``      the machine, and the JSON file
``report``      the tables on the terminal          ``plots`` the pictures
=============== =====================================================================
"""
