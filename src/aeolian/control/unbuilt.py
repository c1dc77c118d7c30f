"""What a Function may ask for and this version of Aeolian takes no notice of: users are told when they deploy it."""

from modal_proto import api_pb2


def unbuilt(function: api_pb2.Function) -> list[str]:
    """A sentence for each such thing; empty when everything that it asks for is done."""
    name = function.function_name
    asked = {
        f"buckets are not mounted yet: '{name}' finds an empty folder in their place": bool(
            function.cloud_bucket_mounts
        ),
        f"clusters are not formed yet: each container of '{name}' is alone": function._experimental_group_size > 1,
    }
    return [f"Aeolian: {sentence}" for sentence, is_asked in asked.items() if is_asked]
