"""Pictures of a test: each image gets a file of its own."""

from cbam_mmdet.engine.hooks.annotated_frame import AnnotatedFrameHook


def test_images_of_one_name_get_files_of_their_own():
    hook = AnnotatedFrameHook()
    images = ['/data/cam1/0.jpg', '/data/cam2/0.jpg', '/data/cam1/0.jpg', '/more/cam2/0.jpg', '/data/cam1/1.jpg']
    files = [hook._own_file(f'vis/{image.rpartition("/")[2]}', image) for image in images]
    assert files == ['vis/0.jpg', 'vis/cam2_0.jpg', 'vis/0.jpg', 'vis/more_cam2_0.jpg', 'vis/1.jpg']
