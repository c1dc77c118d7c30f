"""The Blob RPCs."""

import base64

from modal_proto import api_pb2

from aeolian.control.blobs import Blobs
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument


class BlobRpcs:
    def __init__(self, blobs: Blobs):
        self._blobs = blobs

    async def BlobCreate(self, request: api_pb2.BlobCreateRequest, caller: Caller) -> api_pb2.BlobCreateResponse:
        upload = self._blobs.create(
            request.content_length, _digest(request.content_md5), _digest(request.content_sha256_base64)
        )
        reply = api_pb2.BlobCreateResponse(blob_id=upload.blob_id, blob_ids=[upload.blob_id])
        if upload.url:
            reply.upload_url = upload.url
            reply.upload_urls.items.append(upload.url)
            return reply
        parts = api_pb2.MultiPartUpload(
            part_length=upload.part_length, upload_urls=upload.part_urls, completion_url=upload.completion_url
        )
        reply.multipart.CopyFrom(parts)
        reply.multiparts.items.append(parts)
        return reply

    async def BlobGet(self, request: api_pb2.BlobGetRequest, caller: Caller) -> api_pb2.BlobGetResponse:
        return api_pb2.BlobGetResponse(download_url=await self._blobs.download_url(request.blob_id))


def _digest(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        raise InvalidArgument(f"{text!r} is not base64") from None
