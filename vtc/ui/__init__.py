"""`vtc ui`: a page that shows one question answered with all visual tokens and with fewer, and what was kept.

`examples` and `compare` compute; they know no page. `cards` and `page` show it, and `server` serves the page. Only
`page` and `server` need gradio, which is the extra `ui`.
"""
