"""Multipart uploads that were begun and neither completed nor aborted: obstore lists none, so botocore does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from millpond.store.errors import InvalidInput, StorageFailed


def abort_uploads(
    bucket: str, prefix: str, before: float, config: Mapping[str, Any], profile: str | None = None
) -> list[str]:
    """Abort the unfinished uploads of keys that begin with `prefix` and got no part since `before`; returns their keys.

    An upload that is aborted can never be completed: its writer's next request fails.

    Args:
        bucket: of the store.
        prefix: of the keys.
        before: seconds since 1970, by the store's clock.
        config: obstore's names of endpoint, region and credentials; what it lacks is found as botocore does.
        profile: of ~/.aws.

    Raises:
        StorageFailed: the store refuses.
    """
    try:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session
    except ImportError as error:
        raise InvalidInput(
            "uploads that were not finished are found with botocore; install it with: pip install 'millpond[s3]'"
        ) from error
    endpoint = config.get("endpoint")
    style = "path" if endpoint and not config.get("virtual_hosted_style_request") else "auto"
    client = Session(profile=profile).create_client(
        "s3",
        region_name=config.get("region") or "us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=config.get("access_key_id"),
        aws_secret_access_key=config.get("secret_access_key"),
        aws_session_token=config.get("session_token"),
        config=Config(s3={"addressing_style": style}),
    )
    aborted = []
    try:
        for key, upload in list(_uploads(client, bucket, prefix)):
            place = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
            try:
                if _last_sign_of_life(client, place, upload) <= before:
                    client.abort_multipart_upload(**place)
                    aborted.append(key)
            except client.exceptions.NoSuchUpload:
                continue  # completed or aborted meanwhile
    except (BotoCoreError, ClientError) as error:
        raise StorageFailed(
            f"s3://{bucket}/{prefix}: the store did not abort unfinished uploads ({error}); allow "
            "s3:ListBucketMultipartUploads, s3:ListMultipartUploadParts and s3:AbortMultipartUpload"
        ) from error
    return aborted


def _uploads(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for upload in page.get("Uploads", []):
            if upload["Key"].startswith(prefix):
                yield upload["Key"], upload


def _last_sign_of_life(client: Any, place: dict[str, str], upload: dict[str, Any]) -> float:
    """When the upload began, or got its last part."""
    times: list[datetime] = [upload["Initiated"]]
    for page in client.get_paginator("list_parts").paginate(**place):
        times += [part["LastModified"] for part in page.get("Parts", [])]
    return float(max(time.timestamp() for time in times))
