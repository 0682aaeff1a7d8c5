"""From unstructured logs to training rows: `luthier prepare logs`.

    sources -> blocks (decompressed) -> lines -> records -> masked -> template -> repeats -> rows

Each stage reads from the one before and holds no more than a stated bound, so that memory does not grow with the
logs. What a stage leaves out or changes it counts (`counts`), and what the stages know is written down at fixed
places of the input (`progress`), so that a run that was killed goes on and writes the same bytes.
"""
