# @name@, a library that convgen has made. find_package(@name@) gives the targets
#
#   @name@::@name@   the shared library
#   @name@::static   the same as an archive, in the program
#
# of which a program links one@weights_note@.
# The folder may lie anywhere: name it in CMAKE_PREFIX_PATH, or in @name@_DIR.

if(NOT TARGET @name@::@name@)
  add_library(@name@::@name@ SHARED IMPORTED)
  set_target_properties(@name@::@name@ PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/lib@name@.so"
    IMPORTED_SONAME "lib@name@.so"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
  add_library(@name@::static STATIC IMPORTED)
  set_target_properties(@name@::static PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/lib@name@.a"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}"
    INTERFACE_LINK_LIBRARIES "@libraries@")
endif()
@weights@