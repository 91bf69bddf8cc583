"""A data format of one's own: a log line -> a prompt, or None to leave the row out."""


def to_prompt(row):
    """`{"who": "visitor", "said": "...", "page": "..."}` -> the visitor's words as a prompt; others are left out."""
    if row.get("who") != "visitor":
        return None
    return {"prompt": [{"role": "user", "content": row["said"]}], "page": row.get("page")}
