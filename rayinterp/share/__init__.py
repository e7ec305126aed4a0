"""A run directory, pushed to where others can pull it from.

    run directory --push--> its files, then share.json: every file's size and hash --pull--> another run directory

Targets are fsspec URLs (a folder, `s3://`, `gs://`), dataset repositories of the Hugging Face hub and W&B artifacts.
Tables are folders of files, so nothing is packed. Both ways can be interrupted and begun again: what has arrived whole
is not sent twice. What a target says of itself is not trusted: paths lead nowhere outside, and every byte is hashed.
"""
