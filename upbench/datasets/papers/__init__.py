"""The datasets that papers on upsamplers report on, in their official layouts, one module each."""
