"""The benchmark suite of fastnn: ``python -m benchmarks``.

=============== =====================================================================
``cases``       what is measured, declared once        ``ops`` the functions it names
``modules``     a user's own module, and its layers
``peers``       the implementations that are measured against one another
``check``       agreement with float64, before anything is timed
``runner``      the measurement of the ops
``limits``      what the machine can do at most, and how near to it a row comes
``training``    the examples, trained with ``torch.nn`` and with ``fastnn.nn``
``memory``      what a training step keeps and holds
``record``      the machine, and the JSON file         ``stored`` reads it back
``compare``     what changed between two results
``report``      the tables on the terminal             ``plots`` the pictures
``page``        all of it as one HTML page             ``markdown`` the README's part
=============== =====================================================================
"""
